"""Pictures of what a reducer does."""
