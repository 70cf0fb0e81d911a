"""Block-diffusion sampling, piece by piece; `stage2_student.sampler` is what one calls."""
