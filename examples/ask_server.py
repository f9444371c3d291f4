# /// script
# requires-python = ">=3.10"
# dependencies = ["openai"]
# ///
"""Ask a server that `hires-lmm serve CHECKPOINT` started about a picture; the answer streams.

pip install openai
python examples/ask_server.py examples/images/needle_1.jpg "which digit is blue ?" [--budget 150]
"""

import argparse
import base64
from pathlib import Path

from openai import OpenAI


def main() -> None:
    """Ask once."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("image", type=Path)
    parser.add_argument("question")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--budget", type=int, help="visual tokens; the server needs --request-options")
    arguments = parser.parse_args()
    client = OpenAI(base_url=arguments.url, api_key="none")
    picture = base64.b64encode(arguments.image.read_bytes()).decode()
    kind = arguments.image.suffix.lstrip(".").replace("jpg", "jpeg")
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{picture}"}},
        {"type": "text", "text": arguments.question},
    ]
    options = {"mm_processor_kwargs": {"max_image_tokens": arguments.budget}} if arguments.budget else {}
    answer = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": content}],
        temperature=0,
        stream=True,
        extra_body=options,
    )
    for piece in answer:
        print(piece.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
