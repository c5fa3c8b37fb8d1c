"""Running programs that models wrote, with limits, and judging them from outside."""
