"""Scores a finished model on held-out problems, with no run around it: `orz eval`.

consumes  a Hugging Face directory (a model, or the export of a run), a file of problems
produces  results per problem (JSONL) and a summary: avg@k and pass@k with confidence intervals

score.py samples and grades; observe/estimates.py is the arithmetic.
"""
