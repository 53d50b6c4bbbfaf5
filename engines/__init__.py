"""What runs without torch: artifacts, engine backends and their runners. An application embeds this package."""
