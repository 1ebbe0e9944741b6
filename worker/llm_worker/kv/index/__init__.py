"""Who holds which block, and may that be believed."""
