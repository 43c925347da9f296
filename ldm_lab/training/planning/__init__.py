"""What a training would take: `plan=true`, `data.batch_size=auto`, the trial, the estimate."""
