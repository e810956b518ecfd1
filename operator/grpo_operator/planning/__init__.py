"""What to do about a job: from what is seen of it to actions and a status.

Invariant: pure. The same observation at the same time gives the same plan; nothing here asks, waits or writes. `plan.py` is the way in.
"""
