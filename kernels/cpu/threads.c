#define _GNU_SOURCE
#include "threads.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define MAX_THREADS 64
/* Longer than the gap between two kernels of one forward pass, shorter than what another process would miss. */
#define SPIN_NS 40000

static struct {
    /* Tasks of the running job that nobody has claimed. The job's fields below are read only by a thread that has
     * claimed a task: its unfinished task keeps the job open, so they cannot change under it. */
    _Atomic int unclaimed __attribute__((aligned(64)));
    _Atomic int unfinished __attribute__((aligned(64)));
    _Atomic int caller_sleeps;
    void (*fn)(void *, int) __attribute__((aligned(64)));
    void *arg;
    int num_tasks;
    _Atomic int job __attribute__((aligned(64))); /* futex word: counts the jobs that found a worker asleep */
    _Atomic int sleepers;
    _Atomic int threads; /* 0 until first used */
    int started;         /* workers that exist; changed under the mutex */
} pool;

static pthread_mutex_t pool_mutex = PTHREAD_MUTEX_INITIALIZER;

static void futex_wait(_Atomic int *word, int value) {
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

static void futex_wake(_Atomic int *word, int count) {
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, count, NULL, NULL, 0);
}

static inline void cpu_relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* Claims and runs tasks until none is left. */
static void run_tasks(void) {
    int left = atomic_load(&pool.unclaimed);
    while (left > 0) {
        if (!atomic_compare_exchange_weak(&pool.unclaimed, &left, left - 1))
            continue;
        pool.fn(pool.arg, pool.num_tasks - left);
        if (atomic_fetch_sub(&pool.unfinished, 1) == 1 && atomic_load(&pool.caller_sleeps))
            futex_wake(&pool.unfinished, 1);
        left = atomic_load(&pool.unclaimed);
    }
}

/* Whether worker `index` (1, 2, ...) takes part. */
static int takes_part(int index) { return index < atomic_load(&pool.threads); }

static void sleep_until_job(int index) {
    int seen = atomic_load(&pool.job);
    atomic_fetch_add(&pool.sleepers, 1);
    /* A job published before the line above did not see a sleeper: look once more before sleeping. */
    if (!takes_part(index) || atomic_load(&pool.unclaimed) <= 0)
        futex_wait(&pool.job, seen);
    atomic_fetch_sub(&pool.sleepers, 1);
}

static void *worker(void *arg) {
    int index = (int)(intptr_t)arg;
    for (;;) {
        int64_t deadline = now_ns() + SPIN_NS;
        while (takes_part(index) && atomic_load_explicit(&pool.unclaimed, memory_order_relaxed) <= 0) {
            for (int i = 0; i < 16 && atomic_load_explicit(&pool.unclaimed, memory_order_relaxed) <= 0; i++)
                cpu_relax();
            if (now_ns() > deadline)
                break;
        }
        if (takes_part(index) && atomic_load(&pool.unclaimed) > 0)
            run_tasks();
        else
            sleep_until_job(index);
    }
    return NULL;
}

/* A forked child has none of its parent's threads: it starts its own. */
static void forget_workers(void) {
    pthread_mutex_t fresh = PTHREAD_MUTEX_INITIALIZER;
    pool_mutex = fresh;
    pool.started = 0;
    atomic_store(&pool.unclaimed, 0);
    atomic_store(&pool.sleepers, 0);
}

static void start_workers(int threads) {
    static int fork_handler;
    if (!fork_handler)
        fork_handler = !pthread_atfork(NULL, NULL, forget_workers);
    pthread_attr_t attr;
    pthread_attr_init(&attr);
    pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
    sigset_t all, before; /* signals are for the threads that the program itself made */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (pool.started < threads - 1) {
        pthread_t thread;
        if (pthread_create(&thread, &attr, worker, (void *)(intptr_t)(pool.started + 1)))
            break; /* fewer threads is slower, not wrong */
        pool.started++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attr);
}

int pagoda_threads(void) {
    int n = atomic_load(&pool.threads);
    if (n == 0) {
        cpu_set_t set;
        n = sched_getaffinity(0, sizeof set, &set) ? 1 : CPU_COUNT(&set);
        pagoda_set_threads(n);
        n = atomic_load(&pool.threads);
    }
    return n;
}

void pagoda_set_threads(int n) {
    atomic_store(&pool.threads, n < 1 ? 1 : n > MAX_THREADS ? MAX_THREADS : n);
}

static void wait_until_finished(void) {
    int64_t deadline = now_ns() + SPIN_NS;
    int left;
    while ((left = atomic_load(&pool.unfinished)) > 0) {
        if (now_ns() < deadline) {
            for (int i = 0; i < 16 && atomic_load_explicit(&pool.unfinished, memory_order_relaxed) > 0; i++)
                cpu_relax();
            continue;
        }
        atomic_store(&pool.caller_sleeps, 1);
        left = atomic_load(&pool.unfinished);
        if (left > 0)
            futex_wait(&pool.unfinished, left);
    }
    atomic_store(&pool.caller_sleeps, 0);
}

void pagoda_parallel(void (*fn)(void *arg, int task), void *arg, int num_tasks) {
    int threads = num_tasks > 1 ? pagoda_threads() : 1;
    if (threads == 1 || pthread_mutex_trylock(&pool_mutex)) {
        for (int task = 0; task < num_tasks; task++)
            fn(arg, task);
        return;
    }
    if (pool.started < threads - 1)
        start_workers(threads);
    pool.fn = fn;
    pool.arg = arg;
    pool.num_tasks = num_tasks;
    atomic_store(&pool.unfinished, num_tasks);
    atomic_store(&pool.unclaimed, num_tasks);
    if (atomic_load(&pool.sleepers) > 0) {
        atomic_fetch_add(&pool.job, 1);
        futex_wake(&pool.job, pool.started);
    }
    run_tasks();
    wait_until_finished();
    pthread_mutex_unlock(&pool_mutex);
}
