"""`scripts/gpu_check.sh`: everything that needs a GPU, checked and measured in one command."""
