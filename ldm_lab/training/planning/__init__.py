"""Measures or estimates what training needs: `plan=true`, `data.batch_size=auto`, the trial, the estimate."""
