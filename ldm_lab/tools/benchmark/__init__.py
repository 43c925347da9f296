"""What `python -m ldm_lab benchmark` measures, and against what."""
