"""Particles over noise levels: twists, levels, sweeps."""
