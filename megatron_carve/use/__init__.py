"""What is done with a trained run: text, measurements, folders of other libraries."""
