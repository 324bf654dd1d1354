"""All methods side by side: subnets of one subtask in one T1 network of the arithmetic experiment, at one density."""
