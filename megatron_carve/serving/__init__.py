"""A trained model for many clients at once: an engine in a thread, and HTTP in the form of OpenAI's interface."""
