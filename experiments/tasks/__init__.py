"""What is trained: a module for each family of tasks."""
