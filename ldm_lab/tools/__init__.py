"""The small tools: `python -m ldm_lab NAME ...`. A tool is one module here; its docstring's first line is its entry."""
