"""`python -m llava_steering_plugin` is `llava-steering`."""

from llava_steering_plugin.cli import main

if __name__ == "__main__":
    main()
