/*
 * error.hpp
 *		Error codes of the extension and the only frames that catch errors.
 *
 * The extension is written in "plain frames": no exceptions, no destructors.
 * PG_TRY is written in this file only.  Bodies and handlers are lambdas that
 * run in a callee of the frame that holds the jump buffer, so what they
 * capture by reference needs no volatile and nobody can return out of PG_TRY.
 */
#pragma once

#include "mmrepl/pg.hpp"

/* SQLSTATE class MM is ours; what the peer raised keeps the peer's code. */
#define ERRCODE_MMREPL_NOT_PRELOADED MAKE_SQLSTATE('M', 'M', '0', '0', '1')
#define ERRCODE_MMREPL_INVALID_PAIR MAKE_SQLSTATE('M', 'M', '0', '0', '2')
#define ERRCODE_MMREPL_NO_SUCH_PAIR MAKE_SQLSTATE('M', 'M', '0', '0', '3')
#define ERRCODE_MMREPL_PAIR_EXISTS MAKE_SQLSTATE('M', 'M', '0', '0', '4')
#define ERRCODE_MMREPL_TOO_MANY_STREAMS MAKE_SQLSTATE('M', 'M', '0', '0', '5')
#define ERRCODE_MMREPL_PEER_LACKS_EXTENSION MAKE_SQLSTATE('M', 'M', '0', '0', '6')
#define ERRCODE_MMREPL_REMOTE_MISMATCH MAKE_SQLSTATE('M', 'M', '0', '0', '7')
#define ERRCODE_MMREPL_SYNC_TIMEOUT MAKE_SQLSTATE('M', 'M', '0', '0', '8')
#define ERRCODE_MMREPL_CAPTURED_TOO_LATE MAKE_SQLSTATE('M', 'M', '0', '0', '9')
#define ERRCODE_MMREPL_BAD_BATCH MAKE_SQLSTATE('M', 'M', '0', '1', '0')
#define ERRCODE_MMREPL_OUT_OF_ORDER MAKE_SQLSTATE('M', 'M', '0', '1', '1')
#define ERRCODE_MMREPL_CONFLICT MAKE_SQLSTATE('M', 'M', '0', '1', '2')
#define ERRCODE_MMREPL_WRONG_NODE MAKE_SQLSTATE('M', 'M', '0', '1', '3')
#define ERRCODE_MMREPL_REWOUND MAKE_SQLSTATE('M', 'M', '0', '1', '4')
#define ERRCODE_MMREPL_NEEDS_RESYNC MAKE_SQLSTATE('M', 'M', '0', '1', '5')

namespace mmrepl
{

/*
 * Run body; when it raises, run on_error and raise the same error again.
 */
template <typename Body, typename OnError>
pg_noinline void
Guarded(Body body, OnError on_error)
{
	PG_TRY();
	{
		body();
	}
	PG_CATCH();
	{
		on_error();
		PG_RE_THROW();
	}
	PG_END_TRY();
}

/*
 * Run body, then always, whether or not body raised; an error goes on.
 */
template <typename Body, typename Always>
pg_noinline void
Ensured(Body body, Always always)
{
	PG_TRY();
	{
		body();
	}
	PG_FINALLY();
	{
		always();
	}
	PG_END_TRY();
}

/* The before_shmem_exit callback of EnsuredAtExit(). */
template <typename Always>
void
RunAtExit(int, Datum arg)
{
	(*(Always *) DatumGetPointer(arg))();
}

/*
 * Ensured(), and always runs also when body ends the process (FATAL: the session
 * was terminated while it waited).  For what shared memory must not keep.
 */
template <typename Body, typename Always>
pg_noinline void
EnsuredAtExit(Body body, Always always)
{
	PG_ENSURE_ERROR_CLEANUP(RunAtExit<Always>, PointerGetDatum(&always));
	{
		body();
	}
	PG_END_ENSURE_ERROR_CLEANUP(RunAtExit<Always>, PointerGetDatum(&always));
	always();
}

/*
 * Run body; return NULL when it returned, else a copy of the error in the
 * memory context of the caller, with the error state cleared.
 *
 * Transaction state is the caller's business: after an error inside a
 * transaction the caller aborts it (worker) or ran body in a subtransaction.
 */
template <typename Body>
pg_noinline ErrorData *
Caught(Body body)
{
	MemoryContext caller = CurrentMemoryContext;
	ErrorData *volatile error = NULL;

	PG_TRY();
	{
		body();
	}
	PG_CATCH();
	{
		MemoryContextSwitchTo(caller);
		error = CopyErrorData();
		FlushErrorState();
	}
	PG_END_TRY();
	return error;
}

/*
 * Caught() in a subtransaction of its own, which is rolled back after an error: the
 * caller's transaction may go on.
 */
template <typename Body>
ErrorData *
Attempted(Body body)
{
	MemoryContext context = CurrentMemoryContext;
	ResourceOwner owner = CurrentResourceOwner;

	BeginInternalSubTransaction(NULL);
	MemoryContextSwitchTo(context);
	ErrorData *error = Caught(body);

	if (error == NULL)
		ReleaseCurrentSubTransaction();
	else
		RollbackAndReleaseCurrentSubTransaction();
	MemoryContextSwitchTo(context);
	CurrentResourceOwner = owner;
	return error;
}

/* Run fn with CurrentMemoryContext set; on an error the catcher restores. */
template <typename Fn>
inline auto
InContext(MemoryContext context, Fn fn)
{
	MemoryContext old = MemoryContextSwitchTo(context);

	if constexpr (__is_same(decltype(fn()), void))
	{
		fn();
		MemoryContextSwitchTo(old);
	}
	else
	{
		auto result = fn();

		MemoryContextSwitchTo(old);
		return result;
	}
}

/* Internal error unless the condition holds. */
#define MmreplEnsure(condition, ...)                                                               \
	do                                                                                             \
	{                                                                                              \
		Assert(condition);                                                                         \
		if (unlikely(!(condition)))                                                                \
			ereport(ERROR, (errcode(ERRCODE_INTERNAL_ERROR), errmsg_internal(__VA_ARGS__)));       \
	} while (0)

/*
 * Define a SQL-callable function: exported, and forwarding to a function of
 * the namespace that takes FunctionCallInfo.  PGDLLEXPORT does not mark the
 * function itself on PostgreSQL 15, hence the attribute.
 */
#define MMREPL_EXPORT __attribute__((visibility("default")))
#define MMREPL_FUNCTION(name, target)                                                              \
	extern "C" MMREPL_EXPORT Datum name(PG_FUNCTION_ARGS);                                         \
	extern "C" MMREPL_EXPORT const Pg_finfo_record *pg_finfo_##name(void);                         \
	const Pg_finfo_record *pg_finfo_##name(void)                                                   \
	{                                                                                              \
		static const Pg_finfo_record info = {1};                                                   \
		return &info;                                                                              \
	}                                                                                              \
	Datum name(PG_FUNCTION_ARGS)                                                                   \
	{                                                                                              \
		return target(fcinfo);                                                                     \
	}                                                                                              \
	static_assert(true)

} // namespace mmrepl
