"""What `fxlora` offers on graphs, in one place: it imports networkx, so `fxlora` imports it when one of these is used."""

from __future__ import annotations

from fxlora.inspect.cut import Piece, extract_subgraph
from fxlora.inspect.dot import to_dot, to_svg
from fxlora.inspect.graph_files import describe_graph, write_graph
from fxlora.inspect.model_explorer import to_model_explorer
from fxlora.inspect.networkx_graph import to_networkx
from fxlora.inspect.queries import GraphRegion, dominators, paths_to, region_between, sites_reachable

__all__ = [
    "GraphRegion",
    "Piece",
    "describe_graph",
    "dominators",
    "extract_subgraph",
    "paths_to",
    "region_between",
    "sites_reachable",
    "to_dot",
    "to_model_explorer",
    "to_networkx",
    "to_svg",
    "write_graph",
]
