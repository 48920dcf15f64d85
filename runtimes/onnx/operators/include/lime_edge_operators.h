/* The operators as a library that a program links (Package.swift); a library of its own is found by the one exported name. */
#ifndef LIME_EDGE_OPERATORS_LIBRARY_H
#define LIME_EDGE_OPERATORS_LIBRARY_H

/* Add the operators to an OrtSessionOptions. base: what OrtGetApiBase() gives. NULL, or an OrtStatus that says why not. */
void *RegisterCustomOps(void *options, const void *base);

#endif
