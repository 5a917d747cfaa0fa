"""Files: adapters in peft's layout, merged checkpoints, and the atomic writing of both."""
