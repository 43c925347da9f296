"""From the bytes of one file to an image: pictures of all usual types, arrays of any depth, broken metadata."""
