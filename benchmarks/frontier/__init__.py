"""Accuracy against cost: every method and every price, tuned on a validation split with one budget, then tested.

The protocol is in ``protocol``, the rows in ``table``, one run in ``training``, what is written in ``report``.
"""
