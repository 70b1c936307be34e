"""How well texts fit: POST /v1/score by the probabilities of label tokens, POST /v1/rerank by a judgement."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from trunkline.engine.fields import INT32_MAX, Flag, Items, Number, Rule, Text, read_fields
from trunkline.engine.frontend import Chunk, GenerationRequest, Prepared
from trunkline.engine.reranking import MAX_PAIRS, PAIR_FIELDS, Rank, Ranker, Ranking, ranks_of
from trunkline.engine.scoring import SCORE_FIELDS, ScoreCall, parse_score, scores_of
from trunkline.server.call import Json, ServedModel
from trunkline.server.endpoint import Access, Endpoint, Parts
from trunkline.server.fields import ANY_LENGTH
from trunkline.server.respond import generation
from trunkline.types import RequestError

RERANK_FIELDS: Mapping[str, Rule] = {
    "model": Text(),
    "query": Text(ANY_LENGTH),
    "documents": Items(Text(ANY_LENGTH), MAX_PAIRS, fewest=1),
    "top_n": Number(1, INT32_MAX, integer=True),
    "return_documents": Flag(),
    **{name: rule for name, rule in PAIR_FIELDS.items() if name != "prompt"},
}


def endpoints(parts: Parts) -> list[Endpoint]:
    pooling = parts.frontend.config.model.pooling
    ranker = Ranker(parts.model.template, parts.model.tokenizer, pooling)
    rerank = partial(parse_rerank, ranker=ranker)
    return [
        Endpoint(
            path, ("POST",), generation(parse, parts), Access.USER, fields, summary=summary
        )
        for path, parse, fields, summary in (
            ("/v1/score", parse_scoring, SCORE_FIELDS, "How likely label tokens follow each item"),
            ("/v1/rerank", rerank, RERANK_FIELDS, "Documents by how well they answer a query"),
        )
    ]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ScoringCall:
    """A parsed /v1/score request."""

    call: ScoreCall
    model: ServedModel
    stream: bool = False

    @property
    def requests(self) -> list[GenerationRequest]:
        return self.call.requests

    @property
    def names(self) -> Mapping[str, str]:
        return {"prompt": "items", "input_ids": "items", "token_ids_logprob": "label_token_ids"}

    async def events(
        self, batch: Sequence[Prepared], chunks: AsyncGenerator[Chunk, None]
    ) -> AsyncGenerator[Json, None]:
        result = await scores_of(self.call, chunks)
        yield {
            "object": "scoring",
            "model": self.model.name,
            "scores": result.scores,
            "usage": {
                "prompt_tokens": result.prompt_tokens,
                "total_tokens": result.prompt_tokens,
                "prompt_tokens_details": {"cached_tokens": result.cached_tokens},
            },
        }

    def join(self, events: Sequence[Json]) -> Json:
        return events[-1]


def parse_scoring(body: Mapping[str, Any], model: ServedModel) -> ScoringCall:
    """Check a request. Raises RequestError."""
    call = parse_score(body)
    model.check_name(body.get("model"))
    return ScoringCall(call=call, model=model)


@dataclass(frozen=True, kw_only=True)
class RerankCall:
    """A parsed /v1/rerank request."""

    ranking: Ranking
    documents: list[str]
    top_n: int | None
    return_documents: bool
    stream: bool = False

    @property
    def requests(self) -> list[GenerationRequest]:
        return self.ranking.requests

    @property
    def names(self) -> Mapping[str, str]:
        return {"prompt": "documents"}

    async def events(
        self, batch: Sequence[Prepared], chunks: AsyncGenerator[Chunk, None]
    ) -> AsyncGenerator[Json, None]:
        ranks = await ranks_of(self.ranking, chunks)
        order = sorted(range(len(ranks)), key=lambda index: (-ranks[index].score, index))[: self.top_n]
        yield {"results": [self._result(index, ranks[index]) for index in order]}

    def _result(self, index: int, rank: Rank) -> Json:
        document = {"document": self.documents[index]} if self.return_documents else {}
        return {"score": rank.score, "index": index, **document, "meta_info": rank.meta}

    def join(self, events: Sequence[Json]) -> Any:
        return events[-1]["results"]


def parse_rerank(body: Mapping[str, Any], model: ServedModel, *, ranker: Ranker) -> RerankCall:
    """Check a request. Raises RequestError."""
    fields = read_fields(RERANK_FIELDS, body)
    model.check_name(fields.get("model"))
    for name in ("query", "documents"):
        if name not in fields:
            raise RequestError(f"{name} is missing", code="missing_field", param=name)
    documents = fields["documents"]
    return RerankCall(
        ranking=ranker.ranking([(fields["query"], document) for document in documents], fields),
        documents=documents,
        top_n=fields.get("top_n"),
        return_documents=fields.get("return_documents", True),
    )
