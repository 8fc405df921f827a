/// @file
/// What each of the shared objects exports, under the same names.
#pragma once

extern "C" {

/// Opens a FusedScope on this thread, and ends it.
void* open_scope();
void close_scope(void* scope);

/// The penalty's gradient, by double backward in whatever scope is open on this thread, as one number.
double step();

/// Why a scope cannot be opened, or "".
const char* refusal();

/// How many operations with gates a scope sees in a forward pass with one; -1: it cannot be opened.
int gates_seen();

/// The same in a step of two micro-batches.
int gates_seen_in_step(int workers);

/// What a step without a scope, by LibTorch's own double backward, leaves in `.grad`, as one number.
double stock_step();

/// The same of a step by differences of displaced copies, which the library hands to operations on the thread that
/// calls them; with two workers.
double difference_step();

/// Whether the graph of a tensor, of node.hpp, holds a function of a user's own.
bool has_own_function(const void* tensor);

/// Whether backward passes are recorded by microreg on this thread now.
bool is_fused();
}
