"""What people look at; reads the store and the task's pictures only."""
