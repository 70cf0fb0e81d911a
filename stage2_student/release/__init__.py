"""A student as a thing that is handed on: the released format, its card, export and push."""
