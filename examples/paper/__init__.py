"""The paper's tables (TIDE, arXiv 2604.26951) as one command: at real size, and in miniature."""
