"""Write long captions for images with a vision-language model.

    python pipelines/caption.py --set input=/data/photographs --set output=/data/captioned \\
        --set endpoint.url=http://localhost:8000/v1 --set endpoint.model=Qwen/Qwen2.5-VL-7B-Instruct \\
        --set endpoint.concurrency=64
    python pipelines/caption.py --set input=s3://bucket/coco.json --set output=s3://bucket/captioned \\
        --set strategy=vllm --set vllm.model=Qwen/Qwen2.5-VL-7B-Instruct --set workers.count=4 --set prompt=expand

Input: every layout that prepare.py reads, with or without captions. Try it with --set limit=50 and another output, and
read <output>/_report.html, before you pay for everything. A hosted service is an endpoint too: its key is read from
LONGCLIP_LLM_API_KEY or OPENAI_API_KEY, and is not written anywhere; price_per_million gives the cost, max_total_tokens
limits it.

A reply that is too short or too long, a refusal, a list, a loop or in another language is sent back with the reason.
After checks.attempts replies the row goes to the quarantine file, with the reason. Every reply is stored when it
arrives: to resume a job that was killed, run the same command again; it asks only for what is missing.

Output: <output>/part-*.parquet with id, image, caption, short_caption (the existing one), caption_source and the
columns of source.keep, for prepare.py; _manifest.json, _quarantine.parquet and _report.html. Exit code 8: stopped at
max_total_tokens.
"""

from collections.abc import Sequence

from pipelines.common.entry import run_entry
from pipelines.common.settings import load_settings
from pipelines.data.captions.settings import CaptionSettings


def main(argv: Sequence[str] | None = None) -> None:
    """Run the entry; `argv` is the command line without the program's name."""
    settings = load_settings(CaptionSettings, __doc__ or "", argv)
    from pipelines.data.captions.captioning import caption  # imports Ray and torch, which --help does not need

    caption(settings)


if __name__ == "__main__":
    run_entry(main)
