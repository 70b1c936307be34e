"""How well documents answer queries: what POST /v1/rerank and `Engine.rerank` share."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trunkline.engine.fields import INT32_MAX, Items, Rule, Text, read_fields
from trunkline.engine.frontend import Chunk, GenerationRequest
from trunkline.engine.native import request_ids
from trunkline.engine.scoring import SCORE_FIELDS, label_request, label_scores
from trunkline.engine.vectors import last_chunks, unit_vector, vector_request
from trunkline.text.chat_template import ChatTemplate
from trunkline.text.tokenizer import Tokenizer
from trunkline.types import Pooling, RequestError

MAX_PAIRS = 2048

# The prompt that Qwen3-Reranker was trained with (its model card); other chat models understand it too.
_SYSTEM = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".'
)
_INSTRUCT = "Given a web search query, retrieve relevant passages that answer the query"

_TEXT = Text(INT32_MAX)  # the limit on the body bounds it
PAIR_FIELDS: Mapping[str, Rule] = {
    "prompt": Items(Items(_TEXT, 2, fewest=2), MAX_PAIRS, fewest=1),
    "instruct": _TEXT,
    **{name: SCORE_FIELDS[name] for name in ("rid", "priority", "extra_key", "cache_salt", "user")},
}


@dataclass(frozen=True)
class Rank:
    score: float
    meta: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """What ranks pairs. `judged`: each request asks yes or no about a pair. Else the first requests are the
    vectors of `queries`, different ones, and the others those of the pairs' documents."""

    requests: list[GenerationRequest]
    queries: list[str]  # of each pair
    judged: bool


class Ranker:
    """How a model ranks: one that has a chat template, and single tokens for yes and no, judges; others
    compare vectors."""

    def __init__(self, template: ChatTemplate | None, tokenizer: Tokenizer, pooling: Pooling) -> None:
        words = [tokenizer.encode(word, add_special_tokens=False) for word in ("yes", "no")]
        self._labels = tuple(token for word in words for token in word)
        self._template = template if all(len(word) == 1 for word in words) else None
        self._pooling = pooling

    def parse(self, body: Mapping[str, Any]) -> Ranking:
        """Of fields in PAIR_FIELDS. Raises RequestError."""
        fields = read_fields(PAIR_FIELDS, body)
        if "prompt" not in fields:
            raise RequestError(
                "prompt is missing: send pairs of a query and a document",
                code="missing_field",
                param="prompt",
            )
        return self.ranking([(query, document) for query, document in fields["prompt"]], fields)

    def ranking(self, pairs: Sequence[tuple[str, str]], fields: Mapping[str, Any]) -> Ranking:
        """Of pairs of a query and a document. `fields`: checked ones. Raises RequestError."""
        queries = [query for query, _ in pairs]
        if self._template is not None:
            rids = request_ids(fields, "rerank", len(pairs))
            requests = [
                label_request(
                    rid,
                    _judgement(self._template, fields, *pair),
                    self._labels,
                    fields,
                    add_special_tokens=False,
                )
                for rid, pair in zip(rids, pairs, strict=True)
            ]
            return Ranking(requests=requests, queries=queries, judged=True)
        if "instruct" in fields:
            raise RequestError(
                "instruct: this model compares vectors, which no instruction changes: it has no template, "
                "or no tokens for yes and no",
                code="unsupported_field",
                param="instruct",
            )
        texts = [*dict.fromkeys(queries), *(document for _, document in pairs)]
        rids = request_ids(fields, "rerank", len(texts))
        requests = [
            vector_request(rid, text, self._pooling, fields) for rid, text in zip(rids, texts, strict=True)
        ]
        return Ranking(requests=requests, queries=queries, judged=False)


def _judgement(template: ChatTemplate, fields: Mapping[str, Any], query: str, document: str) -> str:
    instruct = fields.get("instruct", _INSTRUCT)
    question = f"<Instruct>: {instruct}\n<Query>: {query}\n<Document>: {document}"
    messages = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": question}]
    variables = {"enable_thinking": False} if "enable_thinking" in template.variables else {}
    return template.render(messages, tools=None, continue_final_message=False, variables=variables)


async def ranks_of(ranking: Ranking, chunks: AsyncGenerator[Chunk, None]) -> list[Rank]:
    """Of each pair, in their order: the probability of yes, or the cosine of the two vectors."""
    last = await last_chunks(chunks, len(ranking.requests))
    if ranking.judged:
        return [_rank(label_scores(chunk, 1.0)[0], "yes_no", chunk) for chunk in last]
    different = list(dict.fromkeys(ranking.queries))
    vectors = [unit_vector(chunk.embedding) for chunk in last]
    known, count = dict(zip(different, vectors, strict=False)), len(different)
    return [
        _rank(float(known[query] @ vector), "embedding", chunk)
        for query, vector, chunk in zip(ranking.queries, vectors[count:], last[count:], strict=True)
    ]


def _rank(score: float, method: str, chunk: Chunk) -> Rank:
    tokens = {"prompt_tokens": chunk.prompt_tokens, "cached_tokens": chunk.cached_tokens}
    return Rank(score, {"id": chunk.rid, "method": method, **tokens})
