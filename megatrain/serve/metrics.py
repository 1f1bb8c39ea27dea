"""What a server counts, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """The figures of one server."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "megatrain_requests", "Requests that were answered.", ["endpoint", "status"], registry=registry
        )
        self.request_seconds = Histogram(
            "megatrain_request_seconds",
            "Time from a request to the end of its answer.",
            ["endpoint"],
            buckets=SECONDS,
            registry=registry,
        )
        self.prompt_tokens = Counter(
            "megatrain_prompt_tokens", "Tokens of prompts and of embedded or scored texts.", registry=registry
        )
        self.generated_tokens = Counter(
            "megatrain_generated_tokens", "Tokens that were generated.", registry=registry
        )
        self.first_token_seconds = Histogram(
            "megatrain_time_to_first_token_seconds",
            "Time from a request's acceptance to its first token, waiting included.",
            buckets=SECONDS,
            registry=registry,
        )
        self.between_tokens_seconds = Histogram(
            "megatrain_time_between_tokens_seconds",
            "Time from one token of a text to the next.",
            buckets=SECONDS,
            registry=registry,
        )
        self.batch = Histogram(
            "megatrain_batch_texts", "Texts of a pass of the model.", buckets=SIZES, registry=registry
        )
        self.cancelled = Counter(
            "megatrain_cancelled_texts", "Texts that were ended before they were complete.", registry=registry
        )
        self.failures = Counter(
            "megatrain_failed_steps", "Passes of the model that failed.", registry=registry
        )
        self.running = Gauge("megatrain_texts_running", "Texts that are being generated.", registry=registry)
        self.waiting = Gauge("megatrain_texts_waiting", "Texts that wait for their turn.", registry=registry)
        self.blocks = Gauge("megatrain_cache_blocks", "Blocks of the cache.", registry=registry)
        self.blocks_used = Gauge("megatrain_cache_blocks_used", "Blocks that texts have.", registry=registry)

    def text(self) -> bytes:
        """Return all of them in the text format of Prometheus."""
        return generate_latest(self.registry)
