"""Where the loss meets other projects: drop-ins for their classes, a kernel for the Hugging Face Hub."""
