"""Where the bytes of images lie: folders, archives, one array, stores, and local copies of what stores hold."""
