/*
 * wait_chain.cpp
 *		Who waits for whose locks: for deadlocks that the server's detector does not
 *		see, because one of the waits is not for a lock.
 */
#include "mmrepl/base.hpp"

namespace mmrepl
{

void
WaitChain::Add(int pid)
{
	for (int i = 0; i < count; i++)
		if (pids[i] == pid)
			return;
	if (pid > 0 && count < kMax)
		pids[count++] = pid;
}

void
WaitChain::AddBlockersOf(int i)
{
	Datum blockers = DirectFunctionCall1(pg_blocking_pids, Int32GetDatum(pids[i]));
	ArrayType *array = DatumGetArrayTypeP(blockers);
	int n = ArrayGetNItems(ARR_NDIM(array), ARR_DIMS(array));

	for (int k = 0; k < n; k++)
		Add(((const int32 *) ARR_DATA_PTR(array))[k]);
}

} // namespace mmrepl
