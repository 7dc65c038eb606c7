/* Working memory that a thread keeps between calls. */
#ifndef PAGODA_SCRATCH_H
#define PAGODA_SCRATCH_H

#include <stddef.h>

/* Which of a thread's buffers: two users on one call path must not share one. */
enum scratch_use { SCRATCH_LINEAR_CALL, SCRATCH_LINEAR_TASK, SCRATCH_ATTENTION_CALL, SCRATCH_LAYERS, SCRATCH_USES };

/* At least `bytes` bytes at a multiple of 64, valid until this thread's next call for the same use. The content is
 * undefined. The memory grows and stays, because fresh pages cost more than the work done in them. */
void *pagoda_scratch(enum scratch_use use, size_t bytes);

#endif
