"""Responses become rewards by rule.

consumes  the text of a finished response, why it ended, and the reference answer
produces  a `Verdict`: reward 0 or 1 and one word that says why

The rule is `grade.grade`. What its exact comparison cannot settle is decided by processes that can be killed
(`pool.GraderPool`), because a model's answer is hostile input to a computer algebra system.
"""
