"""The paper's eight benchmarks: a student answers them, lm-eval asks and scores.

Not to be confused with `stage2_student.evaluate` (negative log-likelihood on a cache) and with the
folder `benchmarks/` (speed of our own code). In reading order: `protocol` says what is asked and
how, `local_data` finds data sets in a folder, `task_configs` turns both into lm-eval tasks,
`language_model` is what lm-eval talks to, `engines` runs the sampler on one device or several,
`answer_journal` makes a stopped task resumable, `code_execution` runs generated programs, `runner`
ties them together and `score_table` prints the end.
"""
