"""From a program as written to the explicit one, in order: planner, builder, completer, complete, grad,
passes; `refusals` words what does not type."""
