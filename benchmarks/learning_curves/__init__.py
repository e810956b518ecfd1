"""Does a real language model learn as fast here as with TRL? Greedy accuracy and reward curves, side by side.

Model, data, reward, learning rate, batch, samples, number of steps and loss are the same on both sides; each side keeps its own
order of the prompts and its own generators. What differs besides: see docs/benchmarks.md.
"""
