"""The embedded demo: a small teacher, a real cache and two students, on two CPU cores."""
