/* The thread pool that every kernel in this folder shares. */
#ifndef PAGODA_THREADS_H
#define PAGODA_THREADS_H

#ifdef __cplusplus
extern "C" {
#endif

/* Runs fn(arg, task) for every task in [0, num_tasks) and returns when all are done.
 *
 * Tasks are claimed one at a time from an atomic counter, never handed out in fixed shares, so a thread whose
 * core is taken away holds up at most the task it is in. The calling thread takes part. A call made from inside a
 * task, or while another thread's call is running, runs its tasks on the calling thread alone. */
void pagoda_parallel(void (*fn)(void *arg, int task), void *arg, int num_tasks);

/* Sets how many threads take part, the calling one included; the default is one for each usable processor.
 * Values are clamped to [1, 64]. Not to be called while a kernel runs. */
void pagoda_set_threads(int n);

/* How many threads take part. */
int pagoda_threads(void);

#ifdef __cplusplus
}
#endif
#endif
