"""The errors of stepgraph: one base, and a class for each thing that can be wrong.

StepgraphError
├── PlanError (ValueError)            a plan, or what is asked of one
│   ├── ArgumentError                 an argument of a function or a policy
│   ├── MismatchError                 a plan, statistics or factors of another model, scheduler or shape
│   └── FileFormatError               a file that is damaged, cut short, or of another format
├── TraceError (RuntimeError)         a forward that cannot be one static graph
└── CompileError (RuntimeError)       a model and plan that cannot be compiled, or run as asked
    ├── OpError                       a fused operation that no provider takes
    └── CaptureError                  work that cannot be captured in a graph
"""


class StepgraphError(Exception):
    """Whatever stepgraph refuses; the message names the value, what was expected, and what to do."""


class PlanError(StepgraphError, ValueError):
    """A plan that is not valid, or does not fit what it is used with."""


class ArgumentError(PlanError):
    """An argument that a function or a policy does not take."""


class MismatchError(PlanError):
    """Something that was made for another model, other weights, another scheduler or other shapes."""


class FileFormatError(PlanError):
    """A file that is damaged, cut short, or not of the format and version that is read here."""


class TraceError(StepgraphError, RuntimeError):
    """A forward that cannot be traced into one static graph."""


class CompileError(StepgraphError, RuntimeError):
    """A model and plan that cannot be compiled, or an executable that cannot be used as asked."""


class OpError(CompileError):
    """A fused operation that no provider takes."""


class CaptureError(CompileError):
    """Work that cannot be captured in a graph, or whose replay is not the work itself."""
