"""What is done about a job, one concern a file. Each policy takes the draft of a plan and adds to it.

Invariant: a policy reads the clock from the draft alone and calls nothing outside. One that returns True leaves nothing for those after it.
"""
