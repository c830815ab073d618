"""What the first draws tell about a score, a grid and a density before a run."""
