/// @file
/// What each of the two shared objects exports, under the same names.
#pragma once

extern "C" {

/// Opens a FusedScope on this thread, and ends it.
void* open_scope();
void close_scope(void* scope);

/// The penalty's gradient, by double backward in whatever scope is open on this thread, as one number.
double step();

/// Whether backward passes are recorded by microreg on this thread now.
bool is_fused();
}
