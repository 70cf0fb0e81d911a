"""`python -m stage2_student` is `tide-train`."""

from stage2_student.cli import main

main()
