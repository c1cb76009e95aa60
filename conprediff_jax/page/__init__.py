"""A page in the browser: sampling, inpainting, comparing models, and watching runs.

Gradio draws the page. It reads the switches below when it is imported, and calls no other machine.
"""

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
