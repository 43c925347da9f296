"""The small tools: `python -m ldm_lab NAME ...`. A tool is a module, or a folder with a `command`."""
