"""The command line, and what a run in a directory needs: metrics, progress, samples, plots.

Not imported by `import rlhfjax`: it needs the extra `cli`.
"""
