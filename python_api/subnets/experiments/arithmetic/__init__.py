"""Subtask Induction on arithmetic modulo 7 (Zhang, Lepori, Pavlick: arXiv 2310.10899, section 4)."""
