"""What a person sees of a run: metrics on disk, progress, samples and plots.

Not imported by `import rlhfjax`: progress and plots need the extra `experiments`.
"""
