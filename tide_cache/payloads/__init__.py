"""What a teacher says about a masked position, and how it is stored: one module a payload."""
